"""W3C trace context, and which traces are kept."""

import random

import pytest
import structlog

from shared.config import ConfigError, tracing_config
from shared.telemetry.context import Caller, Sampler, begin, parse, sampler_of
from shared.telemetry.otlp import warn_of_ignored

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
CALLER = Caller(bytes.fromhex(TRACE), bytes.fromhex(SPAN), sampled=True)


def test_a_caller_is_read_from_its_header():
    assert parse(f"00-{TRACE}-{SPAN}-01", "vendor=1") == Caller(CALLER.trace_id, CALLER.span_id, True, "vendor=1")
    assert parse(f"00-{TRACE}-{SPAN}-00").sampled is False
    assert parse(f"01-{TRACE}-{SPAN}-01-later-versions-may-say-more").sampled is True


@pytest.mark.parametrize(
    "header",
    [
        "",
        "nonsense",
        f"00-{TRACE}-{SPAN}",
        f"ff-{TRACE}-{SPAN}-01",
        f"00-{'0' * 32}-{SPAN}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"00-{TRACE}-{SPAN}-01-more",
        f"00-{TRACE.upper()}-{SPAN}-01",
    ],
)
def test_a_header_that_is_not_valid_begins_a_new_trace(header):
    assert parse(header) is None


def test_a_state_that_is_too_long_is_dropped_and_not_the_trace():
    assert parse(f"00-{TRACE}-{SPAN}-01", "x" * 600).state == ""


def test_a_request_is_a_child_of_its_callers_span():
    context = begin(CALLER, Sampler(), random.Random(1))
    assert (context.trace_id, context.parent_id, context.sampled) == (CALLER.trace_id, CALLER.span_id, True)


def test_a_request_without_a_caller_begins_a_trace():
    one, two = (begin(None, Sampler(), random.Random(seed)) for seed in (1, 2))
    assert one.parent_id == b""
    assert one.trace_id != two.trace_id
    assert len(one.trace_id) == 16


@pytest.mark.parametrize(
    ("name", "argument", "alone", "with_caller"),
    [
        ("", "", True, True),
        ("parentbased_always_on", "", True, True),
        ("parentbased_always_off", "", False, True),
        ("always_off", "", False, False),
        ("traceidratio", "0", False, False),
        ("parentbased_traceidratio", "0", False, True),
        ("traceidratio", "", True, True),
    ],
)
def test_samplers_as_opentelemetry_names_them(name, argument, alone, with_caller):
    sampler, draw = sampler_of(name, argument), random.Random(3)
    assert begin(None, sampler, draw).sampled is alone
    assert begin(CALLER, sampler, draw).sampled is with_caller


def test_a_caller_that_does_not_sample_is_followed():
    assert begin(Caller(b"t" * 16, b"s" * 8, sampled=False), Sampler(), random.Random(1)).sampled is False


def test_a_ratio_keeps_about_that_share():
    sampler, draw = sampler_of("traceidratio", "0.25"), random.Random(7)
    kept = sum(begin(None, sampler, draw).sampled for _ in range(4000))
    assert 900 < kept < 1100


@pytest.mark.parametrize(
    ("environ", "said"),
    [
        ({"OTEL_TRACES_SAMPLER": "sometimes"}, "OTEL_TRACES_SAMPLER=sometimes"),
        ({"OTEL_TRACES_SAMPLER": "traceidratio", "OTEL_TRACES_SAMPLER_ARG": "2"}, "OTEL_TRACES_SAMPLER_ARG=2"),
        ({"OTEL_EXPORTER_OTLP_PROTOCOL": "carrier-pigeon"}, "carrier-pigeon"),
        ({"OTEL_EXPORTER_OTLP_HEADERS": "nothing"}, "'nothing' is not key=value"),
        ({"OTEL_EXPORTER_OTLP_TIMEOUT": "soon"}, "OTEL_EXPORTER_OTLP_TIMEOUT=soon"),
        ({"OTEL_EXPORTER_OTLP_COMPRESSION": "zip"}, "OTEL_EXPORTER_OTLP_COMPRESSION=zip"),
        ({"OTEL_EXPORTER_OTLP_CERTIFICATE": "/nowhere.pem"}, "OTEL_EXPORTER_OTLP_CERTIFICATE=/nowhere.pem"),
        ({"OTEL_BSP_MAX_EXPORT_BATCH_SIZE": "0"}, "OTEL_BSP_MAX_EXPORT_BATCH_SIZE=0"),
        ({"OTEL_TRACES_EXPORTER": "zipkin"}, "OTEL_TRACES_EXPORTER=zipkin"),
    ],
)
def test_a_variable_that_cannot_be_used_is_refused_by_name(environ, said):
    with pytest.raises(ConfigError, match=said):
        tracing_config("http://127.0.0.1:4317", environ)


@pytest.mark.parametrize("endpoint", ["http://", "ftp://collector:4317", "http://collector:port", "http://c:99999"])
def test_an_endpoint_that_leads_nowhere_is_refused(endpoint):
    with pytest.raises(ConfigError, match="traces cannot go to"):
        tracing_config(endpoint, {})


def test_opentelemetrys_variables_say_where_traces_go():
    assert tracing_config("", {}).export is None
    general = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://collector:4318", "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf"}
    assert tracing_config("", general).export.endpoint == "http://collector:4318/v1/traces"
    own = general | {"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://other/path"}
    assert tracing_config("", own).export.endpoint == "http://other/path"
    assert tracing_config("http://flag:4317", {}).export.endpoint == "http://flag:4317"
    assert tracing_config("http://flag:4317", {"OTEL_SDK_DISABLED": "true"}).export is None
    more = {"OTEL_EXPORTER_OTLP_HEADERS": "authorization=Bearer%20x,b=2", "OTEL_RESOURCE_ATTRIBUTES": "zone=a"}
    export = tracing_config("http://flag:4317", more).export
    assert export.headers == {"authorization": "Bearer x", "b": "2"}
    assert export.resource == {"zone": "a"}


@pytest.mark.parametrize(
    ("endpoint", "insecure", "reached"),
    [
        ("collector:4317", "", "http://collector:4317"),
        ("collector:4317", "false", "https://collector:4317"),
        ("https://collector:4317", "true", "https://collector:4317"),
    ],
)
def test_whether_tls_is_used_is_the_schemes_word_or_else_the_variables(endpoint, insecure, reached):
    environ = {"OTEL_EXPORTER_OTLP_ENDPOINT": endpoint, "OTEL_EXPORTER_OTLP_INSECURE": insecure}
    assert tracing_config("", environ).export.endpoint == reached


def test_a_variable_that_does_nothing_here_is_told_of():
    environ = {
        "OTEL_PROPAGATORS": "b3",
        "OTEL_SPAN_ATTRIBUTE_COUNT_LIMIT": "4",
        "OTEL_METRICS_EXPORTER": "none",
        "OTEL_SERVICE_NAME": "edge",
    }
    assert tracing_config("", environ).ignored == ("OTEL_PROPAGATORS", "OTEL_SPAN_ATTRIBUTE_COUNT_LIMIT")
    with structlog.testing.capture_logs() as logs:
        warn_of_ignored(("OTEL_PROPAGATORS",))
        warn_of_ignored(())
    assert [(line["event"], line["variables"]) for line in logs] == [("otel_variables_ignored", ["OTEL_PROPAGATORS"])]
