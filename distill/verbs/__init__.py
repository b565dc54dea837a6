"""What a step can do: the options of each verb, and the function that makes its model folder."""
