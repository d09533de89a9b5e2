"""How near the predictions of memory come to what llama.cpp really takes."""
