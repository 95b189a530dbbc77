"""The one partition set of the loop: a key names a checkpoint and everything made from it, `RUN-s0000500`."""

import dagster as dg

REALM_CKPT = dg.DynamicPartitionsDefinition(name="realm_ckpt")
