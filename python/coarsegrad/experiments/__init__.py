"""The experiments of the papers, as commands: data, models, the training loop, measurements and figures."""
