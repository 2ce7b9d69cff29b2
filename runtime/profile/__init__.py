"""The profile: one YAML file that says how to run one model on one machine, and what was measured doing so.

Reading is strict: a key that nothing acts on, or a name of something that does not exist, is an error with the nearest
known one. No torch here. `python -m runtime.profile` explains, checks and exports.
"""

from runtime.profile.checkpoints import checkpoint_cache, checkpoint_of, portable
from runtime.profile.configuration import (
    DECODE_KERNELS,
    EVERY_UNITS,
    LOSSY,
    MISS_ACTIONS,
    NUMERICS,
    POLICIES,
    PREDICTORS,
    PREFILL_KERNELS,
    SCHEDULERS,
    Cache,
    Compute,
    Limits,
    Predictor,
    Prefetch,
    Scheduler,
    Tiers,
    Transfer,
)
from runtime.profile.evidence import (
    Bandwidth,
    Evidence,
    Match,
    ModelIdentity,
    Objectives,
    Provenance,
    Ratio,
    Workload,
)
from runtime.profile.files import dump_profile, load_profile, parse_overrides, save_profile
from runtime.profile.lookup import find_profile
from runtime.profile.matching import LEVELS, Level, MachineFacts, MatchResult, machine_facts, match_profile
from runtime.profile.schema import CONFIGURATION, KIND, SCHEMA_VERSION, Profile

__all__ = [
    "CONFIGURATION",
    "DECODE_KERNELS",
    "EVERY_UNITS",
    "KIND",
    "LEVELS",
    "LOSSY",
    "MISS_ACTIONS",
    "NUMERICS",
    "POLICIES",
    "PREDICTORS",
    "PREFILL_KERNELS",
    "SCHEDULERS",
    "SCHEMA_VERSION",
    "Bandwidth",
    "Cache",
    "Compute",
    "Evidence",
    "Level",
    "Limits",
    "MachineFacts",
    "Match",
    "MatchResult",
    "ModelIdentity",
    "Objectives",
    "Predictor",
    "Prefetch",
    "Profile",
    "Provenance",
    "Ratio",
    "Scheduler",
    "Tiers",
    "Transfer",
    "Workload",
    "checkpoint_cache",
    "checkpoint_of",
    "dump_profile",
    "find_profile",
    "load_profile",
    "machine_facts",
    "match_profile",
    "parse_overrides",
    "portable",
    "save_profile",
]
