"""The bundled hh-smollm2 study on its real data, as far as that goes without a model."""

from __future__ import annotations

import os
from importlib import resources
from pathlib import Path

import pytest
import yaml

from equipoise.core.prints import PromptPrints, conversation_text
from equipoise.data.load import load
from equipoise.data.mixture import prints_of
from equipoise.study._graph import build_graph
from equipoise.study._stages import Stages
from equipoise.study.settings import StudySettings

DATA = Path(os.environ.get("EQUIPOISE_DATA") or Path(__file__).parents[2].parent / "shared" / "data")


@pytest.mark.skipif(not DATA.is_dir(), reason="needs the data folder beside the checkout, or EQUIPOISE_DATA")
def test_the_judge_of_hh_smollm2_shares_no_prompt_with_policies_or_test(tmp_path):
    """Clusters alone are not enough: ten policy prompts of one AlpacaEval wording stand nearly among the judge's clusters."""
    text = (resources.files("equipoise.study.studies") / "hh-smollm2.yaml").read_text(encoding="utf-8")
    study = StudySettings.make(yaml.safe_load(text.replace("../shared/data", str(DATA))))
    stages = Stages(study, tmp_path)
    prompts = stages.prompts()
    for source in study.evaluation.prompts:
        axis = source.axis or source.axes[0]
        assert sum(prompt.axis == axis for prompt in prompts) == source.limit
    stages.keep_apart(prompts)
    graph = build_graph(study)
    policy = next(arm for arm in graph.arms if arm.name == "sft").training[0]
    judge, asked = graph.judge[0], PromptPrints.of(conversation_text(prompt.messages) for prompt in prompts)
    rows = {
        node.name: [record for block in node.streams[0].data for record in load(stages._block(block, node)).records]
        for node in (policy, judge)
    }
    assert len(rows["sft"]) == sum(study.data[block].max_rows for block in study.policy_blocks())
    assert len(rows["minilm"]) > len(rows["sft"])
    trained, judged = prints_of(rows["sft"]), prints_of(rows["minilm"])
    assert not asked.shared_with(trained)
    assert not asked.shared_with(judged)
    assert not trained.shared_with(judged)
    # The 50 published harmful prompts are for the opt350m study only.
    published = stages.settings.data["harmless"].exclude_prompts
    assert published
    assert published[0].endswith("harmful_prompts.json")
