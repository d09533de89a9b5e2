"""The demonstration: models that take turns in too little memory."""
