"""Export to and import from the formats of Hugging Face transformers; no model is built."""
