"""How near predictions of memory come to what llama.cpp takes."""
