"""Decoding: KV cache, decode step, sampling and lossless speculation, quantised weights."""
