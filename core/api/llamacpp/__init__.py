"""Routes of llama.cpp's server that are its own, on the path of completions."""
