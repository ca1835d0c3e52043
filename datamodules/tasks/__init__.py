"""Tasks: data sets that come with the package, a data module each; import them from `cotune.datamodules`."""
