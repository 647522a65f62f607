"""The hand-written LLaMA: configuration, transformer, weights, tokenizer, sampling."""
