"""Text outside, tokens inside: tokenizer, incremental detokenizer, stop strings, chat templates."""
