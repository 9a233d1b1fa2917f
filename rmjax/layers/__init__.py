"""Layers without task logic: attention, Transformers, recurrent cells, embeddings, queues."""
