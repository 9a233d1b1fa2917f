"""Sources of long texts, for sequence models, and the tokenizers that make ids of them."""
