"""The same experiment on Flower: many clients on one machine, or one process per client on many machines."""

import os

# Nobody phones home; the first is read once, when flwr is imported.
os.environ.update(FLWR_TELEMETRY_ENABLED="0", FLWR_DISABLE_UPDATE_CHECK="1", RAY_USAGE_STATS_ENABLED="0")
