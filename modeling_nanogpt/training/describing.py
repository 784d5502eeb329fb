"""What a run is: facts that do not change while it runs, for the log, the model card and the checkpoints."""

from dataclasses import dataclass
from pathlib import Path

from accelerate import Accelerator

from ..arithmetic import Choice
from ..configuration_nanogpt import NanoGPTConfig
from ..modeling_nanogpt import NanoGPTForCausalLM
from ..throughput import flops_per_token
from .launching import describe
from .starting import Start, identify_data


@dataclass(frozen=True)
class RunFacts:
    """What a run is: its folder, its flags, its model, its data, and what trains it."""

    out_dir: Path
    recipe: dict  # every flag that has a value
    config: NanoGPTConfig
    parameters: int
    data: dict  # prepared.json of the data_dir
    step_tokens: int  # tokens in an optimizer step
    hardware: str  # processes, devices and precision
    precision: str  # Accelerate's name of it
    attention: str  # the function that computes it
    compiled: bool  # by torch.compile
    resumed_from: Path | None  # the checkpoint that this run goes on from
    introduction: str  # the first lines of the log

    @property
    def step_flops(self) -> float:
        """FLOPs of an optimizer step."""
        return self.step_tokens * flops_per_token(self.config)

    @property
    def identity(self) -> dict:
        """What a resumed run must find again: its flags, the model's shape, and its data."""
        shape, data = self.config.to_dict(), identify_data(self.data)
        computes = {"precision": self.precision, "attention": self.attention, "compile": self.compiled}
        return {"recipe": self.recipe, "config": shape, "data": data, **computes}


def describe_run(
    flags,
    recipe: dict,
    start: Start,
    model: NanoGPTForCausalLM,
    data,
    accelerator: Accelerator,
    precision: Choice,
    attention: Choice,
    compiled: Choice,
) -> RunFacts:
    """The facts of a run. `data` has the contents of prepared.json as `record`.

    `flags` are the trainer's, and `recipe` has all flags as they were given. The two differ in what was found
    automatically, such as the batch size.
    """
    config, parameters, hardware = model.config, model.num_parameters(), describe(accelerator)
    step_tokens = flags.batch_size * flags.gradient_accumulation_steps * config.block_size
    introduction = (
        f"{hardware}{in_brackets(precision.reason)}, {attention.value} attention{in_brackets(attention.reason)}, "
        f"compile={compiled.value}{in_brackets(compiled.reason)}\n"
        f"{describe_start(start, recipe)}\n"
        f"{parameters:,} parameters, {flops_per_token(config):.3g} FLOPs a token, "
        f"{data.record['tokens']['train']:,} tokens to train on\n"
        f"a step: {step_tokens:,} tokens in {flags.gradient_accumulation_steps} micro-batches of "
        f"{flags.batch_size} windows of {config.block_size} tokens"
    )
    return RunFacts(
        out_dir=Path(flags.out_dir),
        recipe=recipe,
        config=config,
        parameters=parameters,
        data=data.record,
        step_tokens=step_tokens,
        hardware=hardware,
        precision=precision.value,
        attention=attention.value,
        compiled=compiled.value,
        resumed_from=start.checkpoint,
        introduction=introduction,
    )


def describe_start(start: Start, recipe: dict) -> str:
    """The second line of the log: where the run starts."""
    if start.checkpoint:
        return f"going on after step {start.state.step}, from {start.checkpoint}"
    return f"starting from {recipe['init_from']}"


def in_brackets(reason: str) -> str:
    return f" ({reason})" if reason else ""


def resolve_recipe(*arguments) -> dict:
    """Every flag that has a value, out of several dataclasses of flags."""
    return {key: value for each in arguments for key, value in vars(each).items() if value is not None}
