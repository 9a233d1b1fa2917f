"""Sources of long texts for sequence models, and the tokenizers that turn texts into ids."""
