"""The parts a model is composed of. Each takes its sizes and dtype when made and reads no globals when run."""
