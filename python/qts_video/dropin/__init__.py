"""How a selector gets into a model: the hooks behind ``qts_video.attach``, a file for each thing they keep right."""
