import pickle

from spike_export.artifacts.errors import RecipeError


def test_a_message_is_one_visible_line_whatever_names_are_in_it() -> None:
    error = RecipeError("recipe.json: \n\u2028key\x1b[31m: extra")
    assert str(error) == "recipe.json: key\\x1b[31m: extra"


def test_an_error_comes_through_a_pipe() -> None:
    error = pickle.loads(pickle.dumps(RecipeError("recipe.json: damaged")))
    assert (type(error), str(error)) == (RecipeError, "recipe.json: damaged")
