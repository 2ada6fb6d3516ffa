import pickle

from spike_export.artifacts.errors import RecipeError


def test_a_message_is_one_visible_line_whatever_names_are_in_it() -> None:
    error = RecipeError("recipe.json: \n\u2028key\x1b[31m: extra")
    assert str(error) == "recipe.json: key\\x1b[31m: extra"


def test_a_message_is_short_whatever_values_are_in_it() -> None:
    error = RecipeError(f"recipe.json: alpha is {'a' * 100_000!r}; {'and so on ' * 10_000}; give a number")
    assert len(str(error)) < 17_000
    assert str(error).startswith("recipe.json: alpha is 'aaa")
    assert str(error).endswith("; give a number")
    path = "/" + "b" * 4_000
    assert path in str(RecipeError(f"{path}: damaged"))


def test_an_error_comes_through_a_pipe() -> None:
    error = pickle.loads(pickle.dumps(RecipeError("recipe.json: damaged")))
    assert (type(error), str(error)) == (RecipeError, "recipe.json: damaged")
