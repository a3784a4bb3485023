"""Mean reward on helpful prompts: how the judge likes what the model answers to everyday requests, with no threshold in between."""

from equipoise.evaluation.metrics._base import reward_metric

METRIC = reward_metric("helpful", "Reward on helpful prompts")
