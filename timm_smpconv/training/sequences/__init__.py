"""Training of the sequence networks by PyTorch Lightning: data, model and command. Needs the extra `sequences`."""
from .data import CharacterTrajectories, DataError, SequenceData, SequentialCIFAR10, SequentialMNIST, SpeechCommands
from .training import SequenceClassifier, rate_factor

__all__ = [
    'CharacterTrajectories', 'DataError', 'SequenceClassifier', 'SequenceData', 'SequentialCIFAR10', 'SequentialMNIST',
    'SpeechCommands', 'rate_factor']
