"""The sizes of models: load options made explicit, memory predicted, and the history of earlier loads."""
