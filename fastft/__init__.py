"""fastft: fast fine-tuning and decoding of Hugging Face models on the hardware you have."""

__version__ = "0.1.0"
