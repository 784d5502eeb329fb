"""Places in a run where a test or an experiment may do something of its own."""


class Hooks:
    """Methods that a run calls. These do nothing: give the trainer's `main` a subclass whose methods do something."""

    def before_step(self, step: int) -> None:
        """An optimizer step is about to begin; the first one is step 0."""

    def before_evaluation(self, step: int) -> None:
        """The model is about to be evaluated, after so many optimizer steps."""

    def training_stream(self, stream, first_step: int):
        """The stream from which training reads its windows, beginning with those of first_step."""
        return stream


NO_HOOKS = Hooks()
