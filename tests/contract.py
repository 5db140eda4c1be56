"""What the contract is asked about: each mixer's small cases on each of its backends that runs on a CPU."""

import importlib

from linattn.core.laws import Subject

MIXERS = ("taylor", "prefix", "lightning", "softmax", "window", "shortconv")


def mixer_module(name):
    return importlib.import_module(f"linattn.mixers.{name}")


def small_cases(name):
    return importlib.import_module(f"linattn.mixers.{name}.cases").SMALL


def name_of(subject):
    return f"{subject.mixer.name}-{subject.backend}-{subject.case.name}"


SUBJECTS = [Subject(mixer_module(name).MIXER, case, "torch") for name in MIXERS for case in small_cases(name)]
