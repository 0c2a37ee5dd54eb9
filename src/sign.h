/*
 * sign.h
 *		Signatures of what is sent: see sign.c.
 */
#ifndef SM_SIGN_H
#define SM_SIGN_H

#include "http.h"

/*
 * Signs a request with the keys of softmobile.signing_key_file, if there is one; id: the
 * same whenever the same is sent again, NULL: it is sent once.  Returns what is wrong, or NULL.
 */
extern const char *sm_sign_request(SmHttpRequest *request, const char *id);

#endif							/* SM_SIGN_H */
