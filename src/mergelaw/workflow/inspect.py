"""Checks of a study's local models and documents, before anything runs."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mergelaw.data.documents import few_documents, shared_documents
from mergelaw.data.inspection import Inspection
from mergelaw.errors import MergelawError
from mergelaw.evaluation.recipe import Evaluation
from mergelaw.merging.methods.learned import FEWEST, Learned
from mergelaw.models.inspect import without_warnings
from mergelaw.workflow.study import Study

RECORDS = 4  # of each file, where not all are looked at


@dataclass
class Findings:
    """Notes on what was seen, and problems that would stop a run; one line each."""

    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @contextmanager
    def at(self, where: str) -> Iterator[None]:
        """Keep an error as a problem at a place of the configuration."""
        try:
            yield
        except MergelawError as error:
            self.problems.append(f"{where}: {error}")


@without_warnings()
def inspect(study: Study, deep: bool = False) -> Findings:
    """Open a study's local checkpoints and the first records of its local files.

    Weights are read where names and shapes do not tell enough. Documents are tokenised with the
    tokenizer of each local base. ``deep`` reads all records.
    """
    findings = Findings()
    bases = _bases(study, findings)
    _experts(study, bases, findings)
    _documents(study, bases, None if deep else RECORDS, findings)
    _evaluation_sets(study, findings)
    _calibration(study, findings)
    return findings


def _bases(study: Study, findings: Findings) -> dict[str, Path]:
    """Folders of the local bases that can be used, by name."""
    from mergelaw.models.inspect import inspect_base

    bases = {}
    for name, base in study.config.bases.items():
        if base.path is not None:
            with findings.at(f"bases.{name}"):
                findings.notes += inspect_base(Path(base.path))
                bases[name] = Path(base.path)
    return bases


def _experts(study: Study, bases: dict[str, Path], findings: Findings) -> None:
    from mergelaw.models.inspect import inspect_expert, same_checkpoints

    config = study.config
    for name, expert in config.models.items():
        kind = "baselines" if name in config.baselines else "experts"
        for base, checkpoint in (expert.checkpoints or {}).items():
            if checkpoint.path is not None and base in bases:
                with findings.at(f"{kind}.{name}.checkpoints.{base}"):
                    findings.notes += inspect_expert(
                        Path(checkpoint.path),
                        bases[base],
                        config.vocabulary,
                        checkpoint.trust or (),
                    )
    for base in config.bases:
        if lacking := [name for name in config.pool() if not config.has(base, name)]:
            findings.notes.append(f"bases.{base}: has no checkpoint of {', '.join(lacking)}")
        identities = {
            name: study.expert(base, name, 0).recipe["checkpoint"]
            for name in config.pool(base)
            if config.models[name].checkpoints is not None
        }
        findings.notes += same_checkpoints(identities)
    common = config.common_pool()
    if common != config.pool():
        names = ", ".join(common) or "none, so there are none"
        findings.notes.append(
            f"laws over several sizes are about the experts of all bases: {names}"
        )


def _documents(
    study: Study, bases: dict[str, Path], records: int | None, findings: Findings
) -> None:
    from mergelaw.data.inspection import inspect as look
    from mergelaw.models.causal_lm import check_length, load_tokenizer
    from mergelaw.models.checkpoint import read_config, vocabulary_size
    from mergelaw.models.parameters import build

    readers: dict[str, tuple[Any, int | None, Any]] = {}
    for name, folder in bases.items():
        with findings.at(f"bases.{name}"):
            rows = vocabulary_size(read_config(folder))
            readers[name] = load_tokenizer(folder), rows, build(folder)
    settings = study.config.evaluation
    for name, domain in study.config.domains.items():
        for key, source in (("source", domain.source), ("eval_source", domain.eval_source)):
            if source is None:
                continue
            where = f"domains.{name}.{key}"
            with findings.at(where):
                for base, (tokenizer, rows, model) in (readers or {"": (None,) * 3}).items():
                    seen = look(source, tokenizer, rows, records, settings.protocol)
                    findings.notes += _notes(seen, where, base, settings)
                    if model is not None:
                        longest = min(seen.longest, settings.max_tokens)
                        findings.notes += check_length(model, longest, f"documents on {base}")
                if seen.earlier_answers:
                    findings.notes.append(
                        f"{where}: {seen.earlier_answers} earlier answers in the chats of "
                        f"{len(seen.documents)} documents are context; only last answers are scored"
                    )


def _notes(seen: Inspection, where: str, base: str, settings: Evaluation) -> Iterator[str]:
    """What the base's chat template changes, and documents that will be refused as too long."""
    count = len(seen.documents)
    for change, number in seen.changes.items():
        yield f"{where}: in {number} of {count} documents the chat template of {base} {change}"
    if seen.longest > settings.max_tokens and settings.long_documents == "refuse":
        yield (
            f"{where}: the longest of {count} documents has {seen.longest:,} tokens on {base}, "
            f"more than evaluation.max_tokens ({settings.max_tokens:,}), and long documents are "
            "refused; raise it, or set evaluation.long_documents"
        )


def _evaluation_sets(study: Study, findings: Findings) -> None:
    """Domains that evaluate the same documents, or few; of local files."""
    try:
        sets = study.evaluated()
    except MergelawError:  # a source that cannot be read is named as the study is resolved
        return
    with findings.at("domains"):
        findings.notes += shared_documents(sets)
    for name, documents in sets.items():
        findings.notes += few_documents(name, len(documents))


def _calibration(study: Study, findings: Findings) -> None:
    """Learned coefficients need some documents of every domain, which files may not have."""
    if not any(isinstance(method, Learned) for method in study.config.methods.values()):
        return
    for name in study.config.domains:
        if not study.config.splits_of(name).calibration_documents:
            continue
        corpus = study.corpora["calibration"].get(name)
        size = corpus.size if corpus else (0, 0)
        if size is not None and size[0] < FEWEST:  # None: not a local file
            findings.problems.append(
                f"domains.{name}: {size[0]} documents are left for calibration, of which the "
                f"method `learned` needs {FEWEST}; give more documents or fewer eval_documents"
            )
