/*
 * http_outcome.h
 *		What the end of a transfer means: see http_outcome.c.
 */
#ifndef SM_HTTP_OUTCOME_H
#define SM_HTTP_OUTCOME_H

#include <curl/curl.h>

#include "http.h"

/* What the callbacks saw of an answer. */
typedef struct SmHttpSeen
{
	size_t		header_bytes;
	bool		headers_done;	/* the blank line after the latest status line */
	bool		too_long;		/* refused, it would exceed a limit */
	bool		no_memory;		/* refused, could not be stored */
	int			peers_refused;	/* addresses outside of the networks allowed ... */
	int			peers_allowed;	/* ... and others */
} SmHttpSeen;

extern void sm_http_outcome_fail(SmHttpResult *result, SmHttpOutcome outcome, const char *text);

/* fill in the result; true if the body that was collected is whole */
extern bool sm_http_outcome_judge(CURL *easy, CURLcode code, const SmHttpSeen *seen,
								  const char *curl_error, SmHttpResult *result);

#endif							/* SM_HTTP_OUTCOME_H */
