"""The rooms of the planner: what is asked (problem), where things are (state), what stays (standing), who goes where
(greedy, spreading, patterns, exact), and how good any plan could be (bound)."""
