"""Models in GGUF files: their config, tokenizer and tensors in the words of Hugging Face checkpoints.

A GGUF file becomes a directory of the cache with a `config.json`, a tokenizer and a link to the file
(`directory.py`), made once. From then on it is a checkpoint like any other: only the tensors are read from GGUF
(`tensors.py`), under the names that the model's modules have (`names.py`).
"""
