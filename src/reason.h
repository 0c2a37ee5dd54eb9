/*
 * reason.h
 *		Where the reason of a change (X-Reason) comes from, and whether it is
 *		good enough.
 */
#ifndef SM_REASON_H
#define SM_REASON_H

#define SM_REASON_MIN_CHARS	5

/* NULL when the text could be a reason, else what is wrong with it. */
extern const char *sm_reason_problem(const char *text);

/* Copy without white space at its ends, in the current memory context. */
extern char *sm_reason_trim(const char *text);

/*
 * The reason in force, trimmed; NULL when there is none.  row_reason is the
 * value of the row's reason column, or NULL.
 */
extern char *sm_reason_current(const char *row_reason);

/* True when a text is long enough for a reason, blanks at its ends not counted. */
extern bool sm_reason_suffices(const char *text);

#endif							/* SM_REASON_H */
