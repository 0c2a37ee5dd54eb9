/*
 * outbox_verify.c
 *		The worker's SQL for comparing numbers with central.
 *
 * Same rules as outbox.c.
 */
#include "postgres.h"

#include "catalog/pg_type.h"
#include "outbox.h"
#include "query.h"

/* The body of POST /verify, with the void numbers of ledger rows after void_after. */
char *
sm_outbox_verify_question(const char *branch, int64 void_after, int64 *void_upto)
{
	static SmQuery query = {
		"SELECT question::text, upto_batch FROM softmobile.verify_question($1, $2)", 2, {TEXTOID, INT8OID}
	};
	SmArgs		args = {0};

	sm_args_text(&args, branch);
	sm_args_int8(&args, void_after);
	sm_query_run(&query, &args);
	*void_upto = sm_row_int8(0, 2);
	return sm_row_text(0, 1);
}

/* False: the answer is none of ours. */
bool
sm_outbox_take_verification(const char *branch, const char *answer, SmVerification *found)
{
	static SmQuery query = {
		"SELECT missing, unknown, forks, why FROM softmobile.take_verification($1, $2)", 2, {TEXTOID, TEXTOID},
		.writes = true
	};
	SmArgs		args = {0};

	sm_args_text(&args, branch);
	sm_args_text(&args, answer);
	sm_query_run(&query, &args);
	if (sm_row_null(0, 1))
		return false;
	found->missing = sm_row_int8(0, 1);
	found->unknown = sm_row_int8(0, 2);
	found->forks = sm_row_int8(0, 3);
	found->why = sm_row_text(0, 4);
	return true;
}
