"""How the processes of one router are started."""

from services.cli.router_processes import make_specs
from shared.config import RouterConfig


def test_each_process_is_told_what_the_router_was_told_its_secrets_by_variables():
    flags = {"api_key": "hush", "internal_token": "psst", "model": "org/name", "router_processes": 3, "grpc_port": 0}
    config = RouterConfig(router_processes=3, max_num_queued_reqs=10)
    specs = make_specs(config, file="s.toml", flags=flags, folder="/f", ports=(50, 80))
    assert [spec.name for spec in specs] == ["router-0", "router-1", "router-2"]
    for index, spec in enumerate(specs):
        assert dict(spec.environ) == {"SLUICE_API_KEY": "hush", "SLUICE_INTERNAL_TOKEN": "psst"}
        assert not any("hush" in part or "psst" in part for part in spec.argv)
        told = {"--model=org/name", "--grpc-port=50", "--port=80", "--router-processes=1", "--config=s.toml"}
        assert told | {"--max-num-queued-reqs=4", f"--peers=/f:{index}:3"} <= set(spec.argv)
        assert spec.ends_cluster
