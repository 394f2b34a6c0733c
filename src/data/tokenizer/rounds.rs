//! The text of a conversation in the generations that have no tokens for roles.

use std::fmt::Write;

/// How a generation writes its rounds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RoundStyle {
    /// Number of the first round.
    first: usize,
    /// What stands between the parts of a round.
    gap: &'static str,
}

impl RoundStyle {
    /// ChatGLM-6B's: counted from 0, a newline between the parts.
    pub const CHATGLM: Self = Self {
        first: 0,
        gap: "\n",
    };
    /// ChatGLM2's: counted from 1, an empty line between the parts.
    pub const CHATGLM2: Self = Self {
        first: 1,
        gap: "\n\n",
    };

    /// The first question behind a system message, for which there is no other place.
    pub fn after_system(self, system: &str, query: &str) -> String {
        format!("{system}{}{query}", self.gap)
    }

    /// The prompt of `query` after earlier questions with their answers, up to where the next
    /// answer begins.
    pub fn prompt<'a>(
        self,
        history: impl IntoIterator<Item = (&'a str, &'a str)>,
        query: &str,
    ) -> String {
        let Self { first, gap } = self;
        let mut prompt = String::new();
        let mut round = first;
        // Writing to a String cannot fail.
        for (query, answer) in history {
            let _ = write!(
                prompt,
                "[Round {round}]{gap}问：{query}{gap}答：{answer}{gap}"
            );
            round += 1;
        }
        let _ = write!(prompt, "[Round {round}]{gap}问：{query}{gap}答：");
        prompt
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounds_are_written_as_each_generation_was_trained() {
        assert_eq!(
            RoundStyle::CHATGLM.prompt([("q", "a")], "x"),
            "[Round 0]\n问：q\n答：a\n[Round 1]\n问：x\n答："
        );
        assert_eq!(
            RoundStyle::CHATGLM2.prompt([("q", "a")], "x"),
            "[Round 1]\n\n问：q\n\n答：a\n\n[Round 2]\n\n问：x\n\n答："
        );
        assert_eq!(
            RoundStyle::CHATGLM2.prompt([], "x"),
            "[Round 1]\n\n问：x\n\n答："
        );
    }
}
