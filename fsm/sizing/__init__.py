"""What a model takes: load options made explicit, memory predicted, earlier loads."""
