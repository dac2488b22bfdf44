"""Bayesian search: `hydra/sweeper=optuna`. The plugin that Hydra finds lies in
launchers/hydra_plugins/ and only calls `Search`.
"""
