"""What every part stands on: the Mixer protocol, laws, dispatch, shapes, configuration. Imports nothing of ours."""
