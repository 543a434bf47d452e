"""The Ray jobs: each module has one public function and runs as a script under `ray job submit`."""
