"""The build of the embedded backbone and its judges, from npm's emoji sets to a package folder."""
