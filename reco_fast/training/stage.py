"""The phase of a run that is under way: how its steps are called, and where their views come from."""

from reco_fast.data.loaders import open_training_loader, recipe
from reco_fast.method.phases import Phase
from reco_fast.method.state import TrainState
from reco_fast.pipelines.base import Loader
from reco_fast.run.progress import Run


class Stage:
    """Begins with the phase of `state.step`, and `follow`s it to the next. Use as a context manager: the loader needs
    closing.

    A process that goes on in the middle of a phase, at its first step or just before it does what one that came there
    by itself did: everything follows from the step.
    """

    phase: Phase
    loader: Loader

    def __init__(self, run: Run, state: TrainState) -> None:
        self._run, self._state = run, state
        self._begin(after=None)

    def follow(self) -> str | None:
        """Begin the phase of the next step if it is another one. Returns a line that says which, or None."""
        if self._run.phase(self._state.step) is self.phase:
            return None
        self.loader.close()
        self._begin(after=self.loader)
        config, step = self.phase.config, self._state.step + 1
        relations = config.loss.uses_global or config.loss.uses_local
        return f"from step {step} on: views of {config.data.image_size} px, objective {'reco' if relations else 'moco'}"

    def _begin(self, after: Loader | None) -> None:
        run, state = self._run, self._state
        self.phase = run.phase(state.step)
        config = self.phase.config
        if len(run.phases) > 1:
            state.enter(config)
        if self.phase.fills_weak_bank and state.step == self.phase.first_step:
            # Random rows would be the first targets: of what there is, the strong keys are nearest to weak ones.
            assert state.bank.weak_keys is not None
            state.bank.weak_keys.copy_(state.bank.keys)
        self.recipe = recipe(config, run.config.data.image_size)
        self.loader = open_training_loader(
            config, run.source, state.device, state.precision, state.step, views=self.recipe, after=after
        )

    def __enter__(self) -> "Stage":
        return self

    def __exit__(self, *raised: object) -> None:
        self.loader.close()
