"""The model in other libraries: each client does its usual work, and its numbers are the model's."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, GradientState
from datasets import Dataset
from safetensors.torch import load_file
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.testing import assert_close
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    ContinuousBatchingConfig,
    DataCollatorForLanguageModeling,
    GenerationConfig,
    Trainer,
    TrainingArguments,
    pipeline,
    set_seed,
)
from transformers.distributed import DistributedConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from modeling_nanogpt import NanoGPTForCausalLM
from modeling_nanogpt.convert import convert
from modeling_nanogpt.modeling_nanogpt import CLASSES
from modeling_nanogpt.sources import adopt_tokenizer, open_source
from support.models import BLOCK, VOCAB, make_model, make_tokens
from support.runs import call_together, finish
from support.texts import TEXT
from tokenization.vocabularies import train_bpe_tokenizer, train_char_tokenizer

CODE = {"configuration_nanogpt.py", "modeling_nanogpt.py"}


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """Trainer builds on accelerate's state, which the whole process shares."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def load(run):
    """The model and the tokenizer of a run."""
    model = AutoModelForCausalLM.from_pretrained(run.out_dir, trust_remote_code=True)
    return model, AutoTokenizer.from_pretrained(run.out_dir, trust_remote_code=True)


def text_of(run):
    return (run.out_dir.parent / "corpus.txt").read_text()


def make_examples(count=8, length=16, prompt_lengths=(0,)):
    """Counting up from various numbers, which is easy to learn. Prompts have various lengths and are not targets."""
    examples = []
    for start in range(count):
        ids = (start + torch.arange(length)) % VOCAB
        labels = ids.clone()
        labels[: prompt_lengths[start % len(prompt_lengths)]] = -100
        examples.append({"input_ids": ids, "labels": labels})
    return examples


def make_trainer(model, folder, examples, **arguments):
    quiet = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "save_strategy": "no", "max_grad_norm": 0}
    arguments = TrainingArguments(str(folder), **quiet | arguments)
    return Trainer(model, arguments, train_dataset=examples, eval_dataset=examples)


def lengths_fed(model, length=4, new=5):
    """How many tokens go through the model at each step of a generation: one at a time if there is a cache."""
    fed = []
    hook = model.transformer.h[0].register_forward_pre_hook(lambda module, args: fed.append(args[0].shape[1]))
    model.eval().generate(make_tokens(1, length), do_sample=False, max_new_tokens=new)
    hook.remove()
    return fed


# ---------------------------------------------------------------------------------------------------------------------
# transformers: generation


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generate_is_the_same_with_each_cache_as_without(cache):
    model, prompt = make_model(), make_tokens(2, 6)
    expected = model.generate(prompt, do_sample=False, max_new_tokens=12, use_cache=False)
    generated = model.generate(prompt, do_sample=False, max_new_tokens=12, cache_implementation=cache)
    assert torch.equal(generated, expected)


def test_beam_search_that_keeps_every_beam_finds_the_likeliest_text():
    model, prompt = make_model(), make_tokens(1, 6)
    every = torch.arange(VOCAB)[:, None]
    with torch.no_grad():
        first = model(prompt).logits[0, -1].log_softmax(-1)
        second = model(torch.cat([prompt.expand(VOCAB, -1), every], dim=1)).logits[:, -1].log_softmax(-1)
    best = divmod((first[:, None] + second).argmax().item(), VOCAB)
    generated = model.generate(prompt, num_beams=VOCAB, do_sample=False, max_new_tokens=2)
    assert tuple(generated[0, 6:].tolist()) == best


def test_sampling_is_repeated_by_its_seed_and_by_no_other():
    model, prompt = make_model(initializer_range=0.05), make_tokens(2, 6)

    def sample(seed):
        set_seed(seed)
        return model.generate(prompt, do_sample=True, max_new_tokens=12)

    assert torch.equal(sample(1), sample(1))
    assert not torch.equal(sample(1), sample(2))


def test_continuous_batching_generates_what_generate_does():
    # It lays requests of all lengths end to end, and passes its paged cache as arguments that only attention reads.
    model, prompts = make_model(), [make_tokens(length, seed=length) for length in (3, 7, 12)]
    outputs = model.generate_batch(
        [prompt.tolist() for prompt in prompts],
        generation_config=GenerationConfig(do_sample=False, max_new_tokens=8, eos_token_id=-1, pad_token_id=0),
        continuous_batching_config=ContinuousBatchingConfig(
            num_blocks=4, max_batch_tokens=64
        ),  # the default takes most of the memory
    )
    assert len(outputs) == len(prompts)
    for prompt, output in zip(prompts, outputs.values(), strict=True):
        alone = model.generate(prompt[None], do_sample=False, max_new_tokens=8)[0, len(prompt) :]
        assert output.generated_tokens == alone.tolist()


def test_pipeline_continues_a_batch_of_prompts_as_each_alone(run):
    model, tokenizer = load(run)
    generator = pipeline("text-generation", model=str(run.out_dir), trust_remote_code=True, device="cpu", batch_size=2)
    prompts = ["to be", "or not to"]
    settings = {"do_sample": False, "max_new_tokens": 6}
    for prompt, (answer,) in zip(prompts, generator(prompts, **settings), strict=True):
        ids = model.generate(**tokenizer(prompt, return_tensors="pt"), **settings)[0]
        assert answer["generated_text"] == tokenizer.decode(ids, skip_special_tokens=True)


def test_a_pipeline_without_a_length_goes_on_to_the_end_of_the_context(run, recwarn, caplog):
    generator = pipeline("text-generation", model=str(run.out_dir), trust_remote_code=True, device="cpu")
    generator.model.generation_config.eos_token_id = None
    context = generator.model.config.block_size
    ids = generator("to be", return_tensors=True)[0]["generated_token_ids"]
    assert len(ids) == context
    inputs = generator.tokenizer("to be", return_tensors="pt")
    assert generator.model.generate(**inputs).shape[1] == context
    with caplog.at_level("WARNING", logger="transformers"):
        assert generator.model.generate(**inputs, max_new_tokens=3).shape[1] == inputs.input_ids.shape[1] + 3
    assert not caplog.records
    with pytest.raises(ValueError, match="no token"):
        generator.model.generate(**generator.tokenizer("", return_tensors="pt"))


@pytest.mark.parametrize("attention", ["eager", "flex_attention"])
def test_a_model_loaded_with_another_attention_has_the_numbers_of_sdpa(attention, tmp_path):
    model, x = make_model(), make_tokens(2, 12)
    model.save_pretrained(tmp_path)
    other = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=attention)
    assert other.config._attn_implementation == attention
    with torch.no_grad():  # on a CPU, flex_attention has no backward pass
        assert_close(other(x).logits, model(x).logits, atol=1e-4, rtol=1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# transformers: Trainer


def test_trainer_learns_and_its_checkpoints_are_whole_models(tmp_path):
    settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "learning_rate": 1e-2}
    saving = {"save_strategy": "steps", "save_steps": 5, "max_steps": 10}
    trainer = make_trainer(make_model(initializer_range=0.02), tmp_path, make_examples(), **settings, **saving)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert before == pytest.approx(math.log(VOCAB), abs=0.5)
    assert trainer.evaluate()["eval_loss"] < before - 1
    for step in (5, 10):
        folder = tmp_path / f"checkpoint-{step}"
        assert {path.name for path in folder.glob("*.py")} == CODE
        auto_map = json.loads((folder / "config.json").read_text())["auto_map"]
        assert set(auto_map) == {"AutoConfig", *CLASSES}
    loaded, x = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True), make_tokens(2, 12)
    assert torch.equal(loaded(x).logits, trainer.model.eval()(x).logits)


def test_accumulated_batches_of_trainer_are_one_large_batch(tmp_path):
    # The micro-batches have different numbers of targets, so the mean of their means would be another step.
    examples, weights = make_examples(prompt_lengths=(0, 3, 14)), []
    for size in (8, 2):
        settings = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 8 // size, "max_steps": 1}
        trainer = make_trainer(make_model(), tmp_path, examples, optim="sgd", learning_rate=0.1, **settings)
        trainer.train()
        weights.append(trainer.model.state_dict())
    start = make_model().state_dict()
    for name, weight in weights[0].items():
        assert not torch.equal(weight, start[name]), name
        assert_close(weights[1][name], weight, msg=name)


def test_gradient_checkpointing_in_trainer_changes_nothing_but_the_work(tmp_path):
    weights, calls = [], []
    for checkpointing in (False, True):
        model = make_model()
        model.transformer.h[0].mlp.register_forward_pre_hook(lambda *_, key=checkpointing: calls.append(key))
        settings = {"gradient_checkpointing": checkpointing, "max_steps": 1, "per_device_train_batch_size": 8}
        make_trainer(model, tmp_path, make_examples(), **settings).train()
        weights.append(model.state_dict())
    assert (calls.count(False), calls.count(True)) == (1, 2)
    for name, weight in weights[0].items():
        assert_close(weights[1][name], weight, msg=name)


def test_what_trainer_saves_still_generates_with_a_cache(tmp_path):
    # Trainer sets use_cache=False in the configuration, and config.json keeps it. `generate` goes by
    # generation_config.json, which keeps True; only a bare forward pass then has to ask for a cache.
    trainer = make_trainer(make_model(), tmp_path, make_examples(), max_steps=1)
    trainer.train()
    trainer.save_model()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)
    assert lengths_fed(trainer.model) == lengths_fed(loaded) == [4, 1, 1, 1, 1]
    assert loaded(make_tokens(1, 4), use_cache=True).past_key_values.get_seq_length() == 4
    going_on = NanoGPTForCausalLM(open_source(str(tmp_path)).config)  # as conversion and training from this folder do
    assert lengths_fed(going_on) == [4, 1, 1, 1, 1]


@pytest.mark.parametrize("adapted", [False, True], ids=["model", "LoRA"])
@pytest.mark.parametrize("prompt", [0, 5])
def test_trainer_smooths_the_label_of_the_next_token(tmp_path, adapted, prompt):
    model, examples = make_model(), make_examples(count=4, prompt_lengths=(prompt,))
    if adapted:
        peft = pytest.importorskip("peft", reason="peft is not installed")
        model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"))
    trainer = make_trainer(model, tmp_path, examples, label_smoothing_factor=0.2)
    batch = {key: torch.stack([example[key] for example in examples]) for key in examples[0]}
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"]).logits
        loss = trainer.compute_loss(model, dict(batch))
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), label_smoothing=0.2)
    assert_close(loss, expected)


@pytest.mark.parametrize("spare", [0, 5], ids=["a full vocabulary", "rows to spare"])
def test_a_padding_token_of_its_own_leaves_the_ends_of_texts_to_be_learned(run, tmp_path, spare):
    # the steps of docs/clients.md
    tokenizer = load(run)[1]
    tokenizer.pad_token = tokenizer.eos_token  # as earlier releases made it
    model = make_model(vocab_size=len(tokenizer) + spare, block_size=16)
    ids = torch.arange(8)[None]
    before = model(ids).logits[..., : len(tokenizer)]
    end, count = tokenizer.eos_token_id, len(tokenizer)
    tokenizer.add_special_tokens({"pad_token": "<|padding|>"})  # <|pad|> is in its vocabulary
    if tokenizer.pad_token_id >= model.config.vocab_size:
        model.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=64)
    assert tokenizer.pad_token_id == count < model.config.vocab_size and tokenizer.eos_token_id == end
    assert_close(model(ids).logits[..., :count], before)

    batch = DataCollatorForLanguageModeling(tokenizer, mlm=False)(
        [tokenizer(text + tokenizer.eos_token) for text in ("to be", "or not to be")]
    )
    ends, padding = batch["input_ids"] == end, batch["input_ids"] == tokenizer.pad_token_id
    assert ends.sum() == 2 and padding.any()
    assert (batch["labels"][ends] == end).all() and (batch["labels"][padding] == -100).all()
    loss = make_trainer(model, tmp_path, []).compute_loss(model, dict(batch))
    assert loss.isfinite()


def test_what_cannot_be_predicted_is_not_learned_with_smoothed_labels(tmp_path):
    examples = [{"input_ids": ids, "labels": ids} for ids in make_tokens(200, 16)]
    settings = {"max_steps": 30, "per_device_train_batch_size": 16, "learning_rate": 1e-2, "logging_steps": 30}
    trainer = make_trainer(
        make_model(initializer_range=0.02), tmp_path, examples, label_smoothing_factor=0.1, **settings
    )
    trainer.train()
    (loss,) = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert loss > math.log(VOCAB) * 15 / 16 - 0.1  # Trainer divides 15 targets by 16 labels


# ---------------------------------------------------------------------------------------------------------------------
# PEFT, TRL, lm-eval


def test_peft_trains_saves_loads_and_merges_a_lora_adapter(tmp_path):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model, x = make_model(initializer_range=0.1), make_tokens(4, 16)
    model.save_pretrained(tmp_path / "base")
    frozen = {name: weight.clone() for name, weight in model.state_dict().items()}
    with pytest.raises(ValueError, match="target_modules"):  # then docs/clients.md could do without
        peft.get_peft_model(model, peft.LoraConfig())
    adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear"))
    linear = [name for name, module in adapted.named_modules() if isinstance(module, peft.tuners.lora.Linear)]
    assert len(linear) == 2 * 4  # every matrix of both blocks, and not the head

    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(10):
        loss = adapted(input_ids=x, labels=x).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.3
    expected = adapted.eval()(input_ids=x).logits
    adapted.save_pretrained(tmp_path / "adapter")
    assert not (tmp_path / "adapter" / "model.safetensors").exists()

    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", trust_remote_code=True)
    assert all(torch.equal(weight, frozen[name]) for name, weight in base.state_dict().items())
    assert (base(x).logits - expected).abs().max() > 0.01
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert_close(loaded(input_ids=x).logits, expected)
    merged = loaded.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", trust_remote_code=True)
    for each in (merged, again):
        assert set(each.state_dict()) == set(frozen)
        assert_close(each(x).logits, expected, atol=1e-4, rtol=1e-4)


@pytest.fixture
def sft(run, tmp_path):
    """TRL's trainer over six lines of the corpus. Several lines fit into one packed row."""
    trl = pytest.importorskip("trl", reason="trl is not installed")
    model, tokenizer = load(run)
    texts = [text_of(run)[start : start + length] for start, length in enumerate((3, 4, 5, 6, 7, 8))]
    arguments = trl.SFTConfig(
        str(tmp_path),
        packing=True,
        max_length=model.config.block_size,
        per_device_train_batch_size=2,
        max_steps=8,
        learning_rate=1e-2,
        logging_steps=1,
        bf16=False,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    dataset = Dataset.from_dict({"text": texts})
    trainer = trl.SFTTrainer(model, arguments, train_dataset=dataset, processing_class=tokenizer)
    return SimpleNamespace(trainer=trainer, model=model, tokenizer=tokenizer, texts=texts)


def test_trl_fine_tunes_on_packed_texts_and_saves_a_whole_model(sft, tmp_path):
    sft.trainer.train()
    losses = [entry["loss"] for entry in sft.trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 0.5
    sft.trainer.save_model()
    loaded, x = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True), make_tokens(2, 12)
    assert_close(loaded(x).logits, sft.trainer.model.eval()(x).logits)


def test_trls_loss_of_packed_texts_is_the_loss_of_each_text_alone(sft):
    total = targets = 0
    with torch.no_grad():
        for text in sft.texts:
            ids = sft.tokenizer(text, return_tensors="pt").input_ids
            ids = F.pad(ids, (0, 1), value=sft.tokenizer.eos_token_id)  # TRL ends each text
            logits = sft.model(ids).logits[0, :-1]
            total += F.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
            targets += len(logits)
        rows = [sft.trainer.train_dataset[i] for i in range(len(sft.trainer.train_dataset))]
        assert len(rows) < len(sft.texts)
        packed = sft.trainer.compute_loss(sft.trainer.model, sft.trainer.data_collator(rows)).item()
    assert packed == pytest.approx(total / targets, rel=1e-5)


TASK = """
task: continuation
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}, cache_dir: {cache}}}
test_split: test
output_type: loglikelihood
doc_to_text: "{{{{context}}}}"
doc_to_target: "{{{{target}}}}"
target_delimiter: ""
metric_list:
  - {{metric: perplexity, aggregation: perplexity, higher_is_better: false}}
"""


def test_lm_eval_scores_a_local_task_as_one_does_by_hand(run, tmp_path):
    lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    text, data = text_of(run), tmp_path / "data.jsonl"
    rows = [{"context": text[i:][: 4 + i // 100].rstrip(), "target": text[i:][20:24]} for i in range(0, 700, 100)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "continuation.yaml").write_text(TASK.format(data=data, cache=tmp_path / "cache"))
    results = lm_eval.simple_evaluate(
        HFLM(pretrained=str(run.out_dir), trust_remote_code=True, device="cpu", batch_size=3),
        tasks=["continuation"],
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        bootstrap_iters=0,
    )

    model, tokenizer = load(run)
    expected = []
    for row in rows:
        context, target = (tokenizer(row[key], return_tensors="pt").input_ids for key in ("context", "target"))
        logits = model(torch.cat([context, target], dim=1)).logits[0, context.shape[1] - 1 : -1]
        expected.append(-F.cross_entropy(logits, target[0], reduction="sum").item())
    samples = sorted(results["samples"]["continuation"], key=lambda sample: sample["doc_id"])
    assert [sample["resps"][0][0][0] for sample in samples] == pytest.approx(expected, rel=1e-4)
    perplexity = math.exp(-sum(expected) / len(expected))
    assert results["results"]["continuation"]["perplexity,none"] == pytest.approx(perplexity, rel=1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# Export


@pytest.mark.parametrize("kind", ["char", "bpe"])
def test_ctranslate2_continues_a_prompt_as_transformers_does(kind, tmp_path):
    ctranslate2 = pytest.importorskip("ctranslate2", reason="ctranslate2 is not installed")
    tokenizer = train_char_tokenizer([TEXT]) if kind == "char" else train_bpe_tokenizer([TEXT], 400)
    model = make_model(vocab_size=len(tokenizer) + 3)
    adopt_tokenizer(model, tokenizer)
    tokenizer.unk_token = None  # as in a model of an earlier release
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    convert(str(tmp_path / "model"), tmp_path / "gpt2", to="gpt2", tokenizer=None)
    ctranslate2.converters.TransformersConverter(str(tmp_path / "gpt2")).convert(str(tmp_path / "ct2"))

    generator = ctranslate2.Generator(str(tmp_path / "ct2"), intra_threads=1)
    inputs = tokenizer("def", return_tensors="pt")
    start, tokens = inputs.input_ids.shape[1], tokenizer.convert_ids_to_tokens(inputs.input_ids[0])
    settings = {"include_prompt_in_result": False, "end_token": []}
    (result,) = generator.generate_batch([tokens], max_length=20, min_length=20, sampling_topk=1, **settings)
    ids = model.generate(**inputs, do_sample=False, max_new_tokens=20, eos_token_id=None)[0]
    assert result.sequences_ids[0] == ids[start:].tolist()


SHAPES = [(1, 1), (3, BLOCK), (5, 7)]  # the example has another shape


def test_torch_export_holds_for_any_batch_and_length():
    model = make_model()
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length", max=BLOCK)
    exported = torch.export.export(
        model,
        (),
        {"input_ids": make_tokens(2, 12), "use_cache": False},
        dynamic_shapes={"input_ids": {0: batch, 1: length}, "use_cache": None},
    ).module()
    for shape in SHAPES:
        x = make_tokens(*shape)
        assert_close(exported(input_ids=x, use_cache=False).logits, model(x).logits)


# ---------------------------------------------------------------------------------------------------------------------
# Several processes, serving


def note_what_tensor_parallel_computes(folder: str, again: str, seen: str) -> None:
    """Each of two processes runs this. `again` is the folder to save the model to, `seen` that for what was seen."""
    model = AutoModelForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(tp_plan="auto"))
    block, x = model.transformer.h[0], torch.load(f"{seen}/x.pt")
    with torch.no_grad():
        logits = model(x).logits
    generated = model.generate(x, do_sample=False, max_new_tokens=8)
    weight = block.mlp.c_fc.weight
    model.save_pretrained(again)
    torch.save(
        {
            "world": dist.get_world_size(),
            "backend": dist.get_backend(),
            "sharded": isinstance(weight, DTensor),
            "rows": (weight.to_local() if isinstance(weight, DTensor) else weight).shape[0],
            "logits": logits,
            "generated": generated,
        },
        f"{seen}/rank{dist.get_rank()}.pt",
    )
    dist.destroy_process_group()


def test_tensor_parallel_over_two_processes_is_the_same_model(tmp_path):
    # an even vocabulary: transformers 5.17 cannot gather a head whose shards differ in width
    model, x = make_model(vocab_size=64), make_tokens(2, 12)
    model.save_pretrained(tmp_path / "model")
    torch.save(x, tmp_path / "x.pt")
    folders = [str(folder) for folder in (tmp_path / "model", tmp_path / "again", tmp_path)]
    running = call_together(2, note_what_tensor_parallel_computes, *folders, log=tmp_path / "log")
    assert finish(*running) == [0, 0], (tmp_path / "log.0").read_text()
    for rank in (0, 1):
        seen = SimpleNamespace(**torch.load(tmp_path / f"rank{rank}.pt"))
        assert (seen.world, seen.backend) == (2, "gloo")
        assert seen.sharded and seen.rows == model.config.intermediate_size // 2
        assert_close(seen.logits, model(x).logits, atol=1e-4, rtol=1e-4)
        assert torch.equal(seen.generated, model.generate(x, do_sample=False, max_new_tokens=8))
    saved, whole = (load_file(tmp_path / folder / "model.safetensors") for folder in ("again", "model"))
    whole["lm_head.weight"] = whole["transformer.wte.weight"]  # shards are saved under both names of a tied weight
    assert set(saved) == set(whole)
    for name, weight in whole.items():
        assert torch.equal(saved[name], weight), name


def test_an_emulation_of_vllms_transformers_backend_computes_the_models_logits(tmp_path, monkeypatch):
    """This is not vLLM. It does with the model, in one process, what vLLM's Transformers backend does.

    The backend builds the base model from the configuration, puts layers of its own in place of each nn.Linear, and
    loads the weights by their names in the file. It lays requests end to end in one row. Its own attention returns
    (tokens, heads * width), and gets what it needs as an argument that the model only passes on.
    """
    model, prompts = make_model(bias=True), [make_tokens(length, seed=length) for length in (5, 9, 3)]
    model.save_pretrained(tmp_path)
    assert type(model).is_backend_compatible()

    instances, lengths, masks = {0: "first", 1: "second"}, [len(prompt) for prompt in prompts], []

    def attention(module, query, key, value, attention_mask, scaling=None, attention_instances=None, **kwargs):
        assert attention_instances[module.layer_idx] == ("first", "second")[module.layer_idx]
        assert module.is_causal and query.shape == key.shape == (1, config.n_head, sum(lengths), module.head_dim)
        masks.append(attention_mask)
        rows = [x.split(lengths, dim=2) for x in (query, key, value)]
        outputs = [
            F.scaled_dot_product_attention(*row, is_causal=True, scale=scaling) for row in zip(*rows, strict=True)
        ]
        return torch.cat(outputs, dim=2).transpose(1, 2).reshape(sum(lengths), -1), None

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "served", attention)

    config = AutoConfig.from_pretrained(tmp_path, trust_remote_code=True)
    config._attn_implementation = "served"
    with torch.device("meta"):
        served = AutoModel.from_config(config, trust_remote_code=True).eval()
    for name, module in list(served.named_modules()):
        if isinstance(module, nn.Linear):
            assert type(module) is nn.Linear
            layer = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
            served.set_submodule(name, layer)
    weights = load_file(tmp_path / "model.safetensors")
    assert all(name.startswith("transformer.") for name in weights)
    weights = {name.removeprefix("transformer."): weight for name, weight in weights.items()}
    served.load_state_dict(weights, strict=True, assign=True)

    with torch.no_grad():
        hidden = served(
            input_ids=torch.cat(prompts)[None],
            position_ids=torch.cat([torch.arange(length) for length in lengths])[None],
            use_cache=False,
            attention_instances=instances,
            return_dict=False,
        )[0][0]
        logits = hidden @ served.get_input_embeddings().weight.t()  # the head is tied
    assert masks == [None, None]
    for prompt, row in zip(prompts, logits.split(lengths), strict=True):
        assert_close(row, model(prompt[None]).logits[0], atol=1e-5, rtol=1e-5)
