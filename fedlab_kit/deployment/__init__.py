"""From a trained module to a measured file: export, conversion for the runtime, measurement, the artifact."""
