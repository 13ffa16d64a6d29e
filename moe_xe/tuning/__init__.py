"""Configurations chosen by measuring: what a choice depends on (key), where it is kept (store), how it is made (tuner)."""

from .key import UNREAD, TuningKey, rows_bucket, skew_bucket, tuning_key
from .store import Entry, TuningStore, default_store
from .tuner import Tuner, default_tuner, is_capturing

__all__ = ["UNREAD", "Entry", "Tuner", "TuningKey", "TuningStore", "default_store", "default_tuner", "is_capturing",
           "rows_bucket", "skew_bucket", "tuning_key"]
