"""DeepSpeed: engine, configuration, optimizers and compiled operators."""
