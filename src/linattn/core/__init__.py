"""What every part stands on: the Mixer protocol, the laws, dispatch, shapes, configuration, error measures. Imports nothing of ours."""
