//! What the three models said, what that is worth, and how it is told.

use super::corpus::{Identity, Who};
use super::exam::{Answers, Questions, Verdict};
use super::table::table;

/// Plain questions that are shown even where every model is right: a few of each language.
const SHOWN_PLAIN: [usize; 4] = [3, 18, 43, 69];

/// Wrong answers shown at most: after a failure the table should still be a page.
const SHOWN_WRONG: usize = 8;

/// What the three models said, and what that is worth.
#[derive(Clone, Debug)]
pub struct Findings {
    /// What they were asked.
    pub questions: Questions,
    /// The base.
    pub base: Finding,
    /// The base with the LoRA adapter.
    pub lora: Finding,
    /// The base with the trained prefix.
    pub prefix: Finding,
}

/// What one model said.
#[derive(Clone, Debug)]
pub struct Finding {
    /// Its answers.
    pub answers: Answers,
    /// What they are worth.
    pub verdict: Verdict,
    /// How long its training took, in seconds.
    pub seconds: f64,
}

impl Findings {
    /// Whether all three learned what they should and kept what they knew.
    pub fn passed(&self) -> bool {
        self.all()
            .iter()
            .all(|(_, _, finding)| finding.verdict.passed())
    }

    /// The answers side by side, then a line for each model.
    pub fn to_text(&self) -> String {
        let mut rows = Vec::new();
        let answers = [&self.base, &self.lora, &self.prefix].map(|finding| &finding.answers);
        for (index, question) in self.questions.identity.iter().enumerate() {
            let [base, lora, prefix] = answers.map(|answers| answers.identity[index].as_str());
            rows.push([question.question.as_str(), base, lora, prefix]);
        }
        let mut wrong = 0;
        for (index, question) in self.questions.plain.iter().enumerate() {
            let said = answers.map(|answers| answers.plain[index].as_str());
            let is_wrong = said.iter().any(|answer| *answer != question.answer);
            wrong += usize::from(is_wrong);
            if SHOWN_PLAIN.contains(&index) || (is_wrong && wrong <= SHOWN_WRONG) {
                let [base, lora, prefix] = said;
                rows.push([question.question.as_str(), base, lora, prefix]);
            }
        }
        let mut text = table(["question", "base", "LoRA", "P-Tuning v2"], &rows);
        if wrong > SHOWN_WRONG {
            let more = wrong - SHOWN_WRONG;
            text += &format!("(and {more} more with a wrong answer; all stand in answers.json)\n");
        }
        text.push('\n');
        for (name, who, finding) in self.all() {
            text += &line(name, who, finding);
        }
        text
    }

    fn all(&self) -> [(&'static str, Who, &Finding); 3] {
        [
            ("base", Who::Old, &self.base),
            ("LoRA", Who::New, &self.lora),
            ("P-Tuning v2", Who::New, &self.prefix),
        ]
    }
}

fn line(name: &str, who: Who, finding: &Finding) -> String {
    let Verdict {
        identity_asked,
        identity_right,
        plain_asked,
        plain_right,
        plain_needed,
    } = finding.verdict;
    let [english, chinese] = Identity::of(who).map(|identity| identity.name);
    let kept = match who {
        Who::Old => "other answers right",
        Who::New => "other answers kept",
    };
    let verdict = match finding.verdict.passed() {
        true => "pass",
        false => "FAIL",
    };
    format!(
        "{verdict}  {name:<11}  {identity_right} of {identity_asked} times {english} / {chinese}, \
         {plain_right} of {plain_asked} {kept} (needed: {plain_needed} %), trained in {:.0} s\n",
        finding.seconds
    )
}
