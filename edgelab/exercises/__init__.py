"""Checked exercises of the notebooks; importing this package registers every one of them.

Torch is imported by the exercises that need it, when they are asked.
"""

from edgelab.exercises import (
    adapting,
    calibration,
    distilling,
    engines,
    hybrid,
    measuring,
    memory,
    one_bit,
    partitioning,
    pruning,
    quantization,
    speed,
    structures,
    training,
)
from edgelab.exercises.checking import EXERCISES, Exercise, UnknownExercise, Verdict, check, exercise
from edgelab.exercises.coding import CodeExercise
from edgelab.exercises.predictions import Prediction, PredictionError, predict

__all__ = [
    "EXERCISES",
    "CodeExercise",
    "Exercise",
    "Prediction",
    "PredictionError",
    "UnknownExercise",
    "Verdict",
    "adapting",
    "calibration",
    "check",
    "distilling",
    "engines",
    "exercise",
    "hybrid",
    "measuring",
    "memory",
    "one_bit",
    "partitioning",
    "predict",
    "pruning",
    "quantization",
    "speed",
    "structures",
    "training",
]
