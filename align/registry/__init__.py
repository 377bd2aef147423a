"""What was made, from what, and by which run: data sets, checkpoints, runs and metrics. No torch anywhere below here."""

from align.registry.records import CheckpointRecord, DataRecord, DataUse, MetricRow, RunRecord
from align.registry.run import NewData, Run
from align.registry.store import Registry

__all__ = ["CheckpointRecord", "DataRecord", "DataUse", "MetricRow", "NewData", "Registry", "Run", "RunRecord"]
