"""What the verbs that train share: the student's options, its plan, its estimate, its dry run, its training."""
