"""The training run: engine (the one door to DeepSpeed), loop, schedule, metrics and what keeps a run alive."""
